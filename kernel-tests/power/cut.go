package power

import (
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
)

// Loss is what a disk does with writes that were not flushed when the power went.
type Loss int

const (
	LoseAll  Loss = iota // none of them is there
	LoseSome             // any of them is
	Tear                 // and any sector of those
	LoseNone             // all of them are

	losses = 4
)

func (l Loss) String() string {
	return [losses]string{"lose all", "lose some", "tear", "lose none"}[l]
}

// A Cut is a moment at which the power goes.
type Cut struct {
	At      int    // so many entries of the log had reached the disk
	Durable int    // so many of them were flushed
	Loss    Loss   // of those between
	Seed    uint64 // what is lost
	Label   string // what was being done
}

func (c Cut) String() string {
	return fmt.Sprintf("cut at entry %d, %d of them not flushed, %v, seed %d, during %q", c.At, c.At-c.Durable, c.Loss, c.Seed, c.Label)
}

// Cut makes the cut after the first at entries.
func (l *Log) Cut(at int, loss Loss, seed uint64) Cut {
	c := Cut{At: at, Loss: loss, Seed: seed}
	for i := at - 1; i >= 0; i-- {
		if l.Entries[i].Flags&Flush != 0 {
			c.Durable = i
			break
		}
	}
	return c
}

// tries is how many more places are looked at for a cut where much is not flushed.
const tries = 4

// Pick returns n cuts in the order of the log, none before the first label: each label's
// turn comes as often as another's, however much is written meanwhile. Half of the cuts
// are where much is not flushed.
func (l *Log) Pick(rnd *rand.Rand, n int, labels []string) (cuts []Cut) {
	at := map[string][]int{}
	var names []string // in the order of the log, so that a seed says all
	for i, label := range labels {
		if label == "" {
			continue
		}
		if at[label] == nil {
			names = append(names, label)
		}
		at[label] = append(at[label], i+1)
	}
	if len(names) == 0 {
		return nil
	}
	start, waiting := rnd.IntN(len(names)), l.waiting()
	for i := range n {
		name := names[(start+i)%len(names)]
		place := at[name][rnd.IntN(len(at[name]))]
		for range i % 2 * tries {
			if other := at[name][rnd.IntN(len(at[name]))]; waiting[other] > waiting[place] {
				place = other
			}
		}
		c := l.Cut(place, Loss(rnd.IntN(losses)), rnd.Uint64())
		c.Label = name
		cuts = append(cuts, c)
	}
	slices.SortFunc(cuts, func(a, b Cut) int { return a.At - b.At })
	return cuts
}

// waiting returns how many bytes are not flushed after the first i entries, for every i.
func (l *Log) waiting() []int64 {
	list := make([]int64, len(l.Entries)+1)
	for i := range l.Entries {
		e := &l.Entries[i]
		switch {
		case e.Flags&Flush != 0: // its own data are not flushed by it
			list[i+1] = e.N
		case e.data():
			list[i+1] = list[i] + e.N
		default:
			list[i+1] = list[i]
		}
	}
	return list
}

// neverTorn is how many bytes from the start of the disk are written whole or not at all:
// ext4's superblock has a checksum and nothing that would repair it before the journal is
// read, so the file system itself depends on that.
const neverTorn = 4096

// Lose writes what the disk has of the writes that were not flushed at the cut, upon what
// was durable. It returns how many bytes are there and how many are lost.
func (l *Log) Lose(disk io.WriterAt, c Cut) (there, lost int64, err error) {
	rnd := rand.New(rand.NewPCG(c.Seed, uint64(c.At)))
	for i := c.Durable; i < c.At; i++ {
		e := &l.Entries[i]
		if !e.data() {
			continue
		}
		unit := e.N
		if c.Loss == Tear && e.Off >= neverTorn {
			unit = tearSize
		}
		for off := int64(0); off < e.N; off += unit {
			if e.Flags&FUA == 0 && (c.Loss == LoseAll || c.Loss != LoseNone && rnd.IntN(2) == 0) {
				lost += unit
				continue
			}
			if err := l.write(disk, e, off, unit); err != nil {
				return there, lost, fmt.Errorf("replay entry %d: %w", i, err)
			}
			there += unit
		}
	}
	return there, lost, nil
}
