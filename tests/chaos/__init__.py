"""The crash campaign: seeded scenarios with real processes on servers of their own.

``python -m tests.chaos --help``; what the scenarios do stands in ``docs/chaos.md``.
"""
