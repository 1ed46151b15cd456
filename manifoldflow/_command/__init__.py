"""The command line: grokking by weight decay, and walks on data of one's own."""

from manifoldflow._command._main import main as main
