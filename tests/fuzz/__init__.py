"""Fuzzing of everything that is read from somebody else: ``make fuzz`` and tests/fuzz/test_fuzz.py."""
