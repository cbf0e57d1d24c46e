"""What an auditor runs: evidence as one file, its verification offline, and the report."""
