"""All components, with one module per kind; import them from `model_components`."""
