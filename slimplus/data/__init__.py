"""Text sources and fixed token windows.

Nothing is imported here: ``slimplus.data.text`` must stay importable without torch, so that a wrong text
source is reported before anything heavy is loaded.
"""
