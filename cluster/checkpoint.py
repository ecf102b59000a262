"""placeholder until merged"""


class Checkpoints: ...
