"""Profiles of machines, and the cost model that is made from one."""
