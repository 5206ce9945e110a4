"""The captured program: sites, expressions of weights, rules, the verifier and the text form."""
