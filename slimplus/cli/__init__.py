"""The command line: `slimplus train`, and the commands that use a packed checkpoint.

Every command checks its input before anything heavy is imported. The modules of commands that use a checkpoint have
`add_arguments(parser)` and `run(arguments)`.
"""
