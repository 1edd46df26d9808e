"""Traces in virtual time through the real router, policies, scheduler and block manager."""
