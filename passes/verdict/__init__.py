"""What is said of every collective: kinds, steps, reasons, and the count of what was communicated."""
