"""Instructions: templates in YAML, tasks that fill them, and how the tasks are mixed.

An example is a prompt and a response, each a row of pieces: text, or the row of an item that is
written as its semantic ID. What becomes of them in a model is told elsewhere (`genrec.trainers`).
"""
