"""Never two at once."""
