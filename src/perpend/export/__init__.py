"""Write an edited checkpoint as a copy of the original in which only the edited byte ranges differ, and prove it."""
