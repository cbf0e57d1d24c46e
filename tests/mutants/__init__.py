"""``make mutants``: does a test fail when the secure sum is changed by one word?"""
