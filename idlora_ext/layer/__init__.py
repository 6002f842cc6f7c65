"""An adapted layer: ``base``, ``ops`` and ``rows`` meet here, and only here. Never walks a model."""
