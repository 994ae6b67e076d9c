"""Pure helpers that methods share; no method, no I/O, no state."""
