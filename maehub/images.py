from dataclasses import dataclass
@dataclass(frozen=True)
class Preprocess:
    size: tuple[int,int]=(224,224)
    @classmethod
    def evaluation(cls, size, channels=3, patch_size=16): return cls(size)
