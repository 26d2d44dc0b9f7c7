"""Teachers that the tests of this folder ask."""

from tests.reasoning import teachers

scripted, talker = teachers.scripted, teachers.talker
