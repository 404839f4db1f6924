"""From what a user names on the command line to a model, its weights, its data and its loss.

Files come from strangers: nothing here unpickles, extracts to disk, or imports what a file names. Code is run only
where the user wrote `module:name` on the command line.
"""
