"""Trainers that take SMT through a plug-in of their own. Each module needs its trainer and is imported by it alone."""
