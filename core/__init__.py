"""The shared core of the lessons: launch, mesh, communication, ledger, model, text, and the frame of a script."""
