"""What Perpend does, one module per task: the functions behind `perpend.fit` and `perpend fit` alike."""
