"""Acting on a model along an axis: interventions as numbers, and hooks that apply and account for them."""
