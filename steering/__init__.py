"""Acting on a model along an axis. Nothing is here yet; the kernel's plain form is `personaxis.persona.axis.apply_cap`."""
