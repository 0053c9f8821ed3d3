"""Requests to the KFP API: runs and schedules."""
