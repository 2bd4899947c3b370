"""Computes what the scheduler decided. This package needs torch only, and takes no decision."""
