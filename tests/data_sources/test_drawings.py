"""Drawings: the same for the same seed, all different, and read as a folder with four classes."""

from data import load_dataset
from data_sources import drawings
from data_sources.cache import Pictures, cached


def test_drawings_are_pictures_of_four_classes_and_the_same_for_the_same_seed(tmp_path):
    def draw(name, *flags):
        assert drawings.main([str(tmp_path / name), "--count", "16", *flags]) == 0
        return {file.relative_to(tmp_path / name): file.read_bytes() for file in sorted((tmp_path / name).rglob("*.*"))}
    first = draw("first")
    assert draw("again") == first and not set(draw("other", "--seed", "1").values()) & set(first.values())
    assert len(set(first.values())) == 16 and {path.suffix for path in first} == {".png", ".jpg"}
    data = load_dataset(cached(Pictures(str(tmp_path / "first")), tmp_path / "data", quiet=True))
    assert data.class_names == ("boat", "fish", "flower", "house") and data.images.shape == (16, 3, 32, 32)
    assert (data.images.float().std((1, 2, 3)) > 20).all()


def test_nothing_is_drawn_among_other_files(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert drawings.main([str(tmp_path)]) == 2 and "not empty" in capsys.readouterr().err
    for name in ("mine.txt", "mine.txt/inside"):
        assert drawings.main([str(tmp_path / name)]) == 2 and capsys.readouterr().err.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
