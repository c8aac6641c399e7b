"""Who computes what a command asks for: this process, or Ray's workers. Only its modules name actors outside actors.

Each is of one product, so that drawing a picture does not import training. Ray is imported when a function is called.
"""
