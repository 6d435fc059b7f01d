"""A whole model as one native program: ``plan_for`` gives the plan of a call, ``last_plan`` that of the last one.

plan.py           the plan, kept by shape, and when there is one
lowering.py       from a module's fused graph to steps; calls.py and operations.py know which
precision.py      which steps of a quantised model are in int8
schedule.py       order, images at a time and places of the values; memory.py is where
torch_program.py  the same steps as calls of ops
"""

from resnet_fast.network.plan import Plan, last_plan, plan_for

__all__ = ["Plan", "last_plan", "plan_for"]
