"""`lorafit doctor`: what training needs of this machine, each as one line: ok, or what mends it. No torch in here."""
