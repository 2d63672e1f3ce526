"""Fitting the axis and the persona space, with their uncertainty."""
