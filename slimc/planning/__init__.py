"""Planning: which expression each site gets, so that all together keep to a budget and the model suffers least."""
