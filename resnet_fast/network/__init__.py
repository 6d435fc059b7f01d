"""A whole model as one native program: ``plan_for`` gives the plan of a call, ``last_plan`` that of the last one."""

from resnet_fast.network.plan import Plan, last_plan, plan_for

__all__ = ["Plan", "last_plan", "plan_for"]
