"""The components, a module for each kind; import them from `model_components`."""
