"""The commands for using a packed checkpoint. Each module has `add_arguments(parser)` and `run(arguments)`.

They check their input before anything heavy is imported.
"""
