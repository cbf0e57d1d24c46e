"""The append-only privacy ledger: an RFC 6962 tree over RFC 8785 leaves."""
