"""Tuning: an Optuna study on the validation classes, with many workers. Nothing else in svip imports optuna."""
