"""Pictures made from the committed table and from a report."""

import pytest
from matplotlib import pyplot as plt

from benchmarks import harness, plot


@pytest.fixture
def rows():
    return harness.read_rows()


def widths(axes):
    """Provider -> length of its bar."""
    labels = [label.get_text() for label in axes.get_yticklabels()]
    return [bar.get_width() for bar in axes.patches], labels


def test_loss_shows_the_table_s_medians(rows):
    figure = plot.plot_loss(rows, "halo cogvideox bfloat16")
    lengths, labels = widths(figure.axes[0])
    assert labels == list(reversed(plot.LOSS))
    chosen = {
        row["provider"]: 1e3 * float(row["p50"])
        for row in rows
        if (row["mode"], row["case"], row["metric"]) == ("loss", "halo cogvideox bfloat16", "seconds")
        and row["setting"] == "threads=1; memory=fresh"
    }
    assert lengths == pytest.approx([chosen[name] for name in labels])
    assert "commit" in figure._supxlabel.get_text()
    plt.close(figure)


def test_step_has_its_limit_as_a_dashed_line(rows):
    figure = plot.plot_step(rows, "wan full")
    for axes in figure.axes:
        assert [line.get_linestyle() for line in axes.lines if len(line.get_xdata()) == 2].count("--") == 1
    plt.close(figure)


def test_no_label_leaves_the_picture(rows):
    for _, figure in plot.figures(rows):
        figure.canvas.draw()
        frame = figure.bbox
        texts = [text for axes in figure.axes for text in (*axes.texts, axes.xaxis.label, *axes.get_yticklabels())]
        for text in filter(lambda text: text.get_text(), texts):
            box = text.get_window_extent()
            assert frame.x0 <= box.x0 and box.x1 <= frame.x1, text.get_text()
        plt.close(figure)


def test_the_script_writes_both(tmp_path):
    assert plot.main(["--output", str(tmp_path), "--format", "svg"]) == 0
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(first) == {"loss.svg", "step.svg"}
    plot.main(["--output", str(tmp_path), "--format", "svg"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first  # no dates, no random names


def test_what_was_not_measured_is_named(rows):
    absent = ("step", "ours, selective, cached")
    figure = plot.plot_step([row for row in rows if (row["mode"], row["provider"]) != absent], "wan full")
    assert "not measured" in [text.get_text() for text in figure.axes[0].texts]
    plt.close(figure)
