"""What judges images: networks that look at them, figures, reports, checks, and views into a network."""
