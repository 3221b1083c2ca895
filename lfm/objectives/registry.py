"""Objectives by `objective.kind`: a union, discriminated by it, once there are several."""

from lfm.objectives.next_token import NextToken

ObjectiveConfig = NextToken
