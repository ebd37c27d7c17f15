"""What a finished run can be asked beside its front: one idea to a file, each a pure function of arrays.

``measurement`` gets the arrays from a run directory, ``evaluation`` puts the answers together.
"""
