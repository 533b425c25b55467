"""The runtimes that a patch can be proven in: one file each says how it is started, asked and ended.

`RUNTIMES` is the table. A runtime runs in a process of its own, with the Python of the environment that it is installed
in; `programs` is what that Python runs where a runtime has no server of its own.
"""
