"""Acting on duplicates: a plan that people edit, its careful execution, and the way back."""
