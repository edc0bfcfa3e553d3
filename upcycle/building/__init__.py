"""From dense weights to experts: the plan, the surgery, the receipt."""
