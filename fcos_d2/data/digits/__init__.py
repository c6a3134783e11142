"""The built-in datasets ``digits_train`` and ``digits_val``: how they look, where they lie."""
