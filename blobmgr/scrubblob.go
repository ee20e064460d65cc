package blobmgr

import (
	"context"
	"errors"
	"fmt"
	"os"
)

// open scrubs b, which is open, from unit at on. It returns how far it came, and true if
// b was closed before the end.
func (s *scrub) open(ctx context.Context, b *Blob, at int) (next int, again bool, err error) {
	var release func()
	defer func() {
		if release != nil {
			release()
		}
	}()
	for {
		b.digests.RLock()
		first, last := s.units(b.table, b.present, at)
		b.digests.RUnlock()
		if first == last {
			return first, false, nil
		}
		if err := s.wait(ctx, b.table, first, last); err != nil {
			return first, false, err
		}
		wrong, err := b.inspect(s, first, last)
		if err != nil {
			return first, true, nil // it is closed
		}
		if len(wrong) > 0 && release == nil && s.o.Reopen != nil {
			if release, err = s.o.Reopen(b); err != nil {
				err = fmt.Errorf("it stays as it is, because its readers cannot be made to ask again: %w", err)
			}
		}
		for _, u := range wrong {
			why := err
			if why == nil {
				why = b.repair(ctx, u)
			}
			s.wrong(b.name, b.table.Unit(u).Off, why)
		}
		at = last
	}
}

// inspect returns the units of [first, last) that are present and wrong; all when they
// cannot be read. b is not closed meanwhile.
func (b *Blob) inspect(s *scrub, first, last int) (wrong []int, err error) {
	b.mu.Lock()
	if b.closed {
		b.mu.Unlock()
		return nil, os.ErrClosed
	}
	b.work.Add(1)
	b.mu.Unlock()
	defer b.work.Done()
	p, err := s.read(b.cache, b.table, first, last)
	b.digests.RLock()
	defer b.digests.RUnlock()
	base := b.table.Unit(first).Off
	for u := first; u < last; u++ {
		x := b.table.Unit(u)
		// What is not present any more is verified by whoever reads it.
		if b.present.has(u) && (err != nil || b.table.Verify(u, p[x.Off-base:][:x.Len]) != nil) && b.present.has(u) {
			wrong = append(wrong, u)
		}
	}
	return wrong, nil
}

// repair makes the wrong unit u absent and fetches it. The mark goes first, for good, and
// comes back with the repaired unit. Readers of u wait as for any other that is absent.
func (b *Blob) repair(ctx context.Context, u int) error {
	if err := b.refuse(ctx, u); err != nil {
		return err
	}
	x := b.table.Unit(u)
	err := b.Fill(ctx, x.Off, x.Len)
	if errors.Is(err, os.ErrClosed) {
		return nil // no mark has it: whoever opens b again verifies it
	}
	return err
}

// refuse makes unit u absent.
func (b *Blob) refuse(ctx context.Context, u int) error {
	if err := b.durable.take(ctx); err != nil {
		return err
	}
	defer b.durable.give()
	if err := b.removeMark(); err != nil {
		return fmt.Errorf("it stays as it is: %w", err)
	}
	b.digests.Lock()
	defer b.digests.Unlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.doubt([]int{u})
	b.suspect.clear(u) // what is there is known to be wrong
	b.nudgeLocked()
	return nil
}

// closed scrubs what the clean mark of a blob lists that nobody has open, from unit at on.
// It returns how far it came, and true if an image has opened it meanwhile.
func (s *scrub) closed(ctx context.Context, file string, at int) (next int, again bool, err error) {
	k, err := s.m.openKept(file)
	if err != nil || k == nil {
		return at, false, err
	}
	defer k.close()
	for {
		first, last := s.units(k.table, k.clean, at)
		if first == last {
			return first, false, nil
		}
		if err := s.wait(ctx, k.table, first, last); err != nil {
			return first, false, err
		}
		// Whether anybody uses the file is seen by who has it open: not we, then.
		if b, err := s.m.peek(ctx, file); b != nil || err != nil {
			return first, err == nil, err
		}
		if len(k.inspect(s, first, last)) > 0 {
			if again, err := s.strike(ctx, file, first, last); again || err != nil {
				return first, again, err
			}
		}
		at = last
	}
}

// strike takes the wrong units of [first, last) from the mark of a blob, unless it is open
// by now, which again says. It looks at all once more, because nobody held it still.
func (s *scrub) strike(ctx context.Context, file string, first, last int) (again bool, err error) {
	n, err := s.m.take(ctx, file)
	if err != nil {
		return false, err
	}
	defer s.m.drop(file, n)
	defer n.turn.give()
	if n.blob != nil {
		return true, nil
	}
	k, err := s.m.openKept(file)
	if err != nil || k == nil {
		return false, err
	}
	defer k.close()
	wrong := k.inspect(s, first, min(last, k.table.Units()))
	if len(wrong) == 0 {
		return false, nil
	}
	for _, u := range wrong {
		k.clean.clear(u)
	}
	err = s.m.dir.write(file+cleanSuffix, marshalClean(k.sum, k.clean), true)
	if err != nil { // rather none at all: everything is verified then
		err = s.m.dir.removeDurably(file + cleanSuffix)
	}
	for _, u := range wrong {
		s.wrong(file, k.table.Unit(u).Off, err)
	}
	return false, nil
}
