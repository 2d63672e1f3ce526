"""What a persona is and how it is observed: models, roles, rollouts, recorded activations, the axis and its
files.
"""
