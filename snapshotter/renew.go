package snapshotter

import (
	"context"
	"crypto/sha256"
	"errors"
	"time"
)

// A Renewal says when the daemon is told of logins anew, of images that are mounted. It has
// them in memory only, as we do: after a restart of either the source is asked again.
type Renewal struct {
	// Look is how often the daemon is asked whether a registry refuses a login, and whether
	// one is to be renewed; 0: never, and nothing is renewed.
	Look time.Duration
	// Every is how often the source is asked for all images; 0: never.
	Every time.Duration
	// Changed says that the source may know another login for any image; it may be nil.
	Changed <-chan struct{}
	// Refused is told, before the source is asked, that a registry has refused the login for
	// the image of a reference; it may be nil.
	Refused func(reference string)
}

// WithRenewal has logins renewed; without it they are not.
func WithRenewal(r Renewal) Opt { return func(s *Snapshotter) { s.renewal = r } }

// told is what the daemon was told last of the image of a snapshot.
type told struct {
	layer  lazyLayer
	record record
	config [sha256.Size]byte // of which the sum is enough; zero: not told
	until  time.Time         // of Origin
}

func (m *images) setTold(t told) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.told[t.layer.id] = t
}

// allTold returns what was told of the images that are mounted.
func (m *images) allTold() (list []told) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for id, t := range m.told {
		if m.mounted[id] {
			list = append(list, t)
		}
	}
	return list
}

// toldOf returns what was told last of the image of a snapshot that is mounted.
func (m *images) toldOf(id string) (told, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	t, ok := m.told[id]
	return t, ok && m.mounted[id]
}

// renewMaxPause is the longest pause between attempts to renew a login that is refused.
const renewMaxPause = 5 * time.Minute

// A renewer is what renewOn remembers: by snapshot, when an image that needs a login may be
// tried again.
type renewer map[string]attempt

type attempt struct {
	next  time.Time
	pause time.Duration
}

// renewOn renews logins until the end, one after the other.
func (s *Snapshotter) renewOn() {
	look := time.NewTicker(s.renewal.Look)
	defer look.Stop()
	var every <-chan time.Time
	if s.renewal.Every > 0 {
		t := time.NewTicker(s.renewal.Every)
		defer t.Stop()
		every = t.C
	}
	tried := renewer{}
	for all := false; ; {
		select {
		case <-s.ctx.Done():
			return
		case <-s.renewal.Changed:
			all = true
		case <-every:
			all = true
		case <-look.C:
		}
		if s.renewAll(tried, all) {
			all = false
		}
	}
}

// renewAll renews the logins of all images, or of those that need it. It returns false when
// the daemon does not answer: it is tried again.
func (s *Snapshotter) renewAll(tried renewer, all bool) bool {
	list := s.images.allTold()
	if len(list) == 0 {
		clear(tried)
		return true
	}
	denied, err := s.denied()
	if err != nil {
		return false
	}
	for _, t := range list {
		id, refused := t.layer.id, denied[t.record.key()]
		needed := refused || !t.until.IsZero() && time.Now().After(t.until)
		if !needed {
			delete(tried, id)
		}
		if !all && (!needed || time.Now().Before(tried[id].next)) {
			continue
		}
		if needed {
			pause := min(max(2*tried[id].pause, s.renewal.Look), renewMaxPause)
			tried[id] = attempt{time.Now().Add(pause), pause}
		}
		if err := s.renew(t.layer.id, refused); err != nil && s.ctx.Err() == nil {
			s.log.Warn("renew the login of an image", "image", t.record.name(), "err", err)
		}
	}
	for id := range tried {
		if _, ok := s.images.toldOf(id); !ok {
			delete(tried, id)
		}
	}
	return true
}

// denied returns the images, by record.key, whose backend has refused the login last.
func (s *Snapshotter) denied() (map[string]bool, error) {
	ctx, cancel := context.WithTimeout(s.ctx, renewTime)
	defer cancel()
	st, err := s.mounter.Status(ctx)
	denied := map[string]bool{}
	for _, m := range st.Images {
		for _, b := range m.Blobs {
			if b.Denied {
				denied[record{Image: m.ID, Domain: m.DomainID}.key()] = true
			}
		}
	}
	return denied, err
}

// renewTime is how long an image may keep those after it waiting.
const renewTime = time.Minute

// renew has the daemon told of the image of a snapshot again, if its source says something
// else than before. A login that is not there any more stays with the daemon: containers
// read with it.
func (s *Snapshotter) renew(id string, refused bool) error {
	ctx, cancel := context.WithTimeout(s.ctx, renewTime)
	defer cancel()
	t, ok := s.images.toldOf(id)
	if !ok {
		return nil
	}
	give, err := s.images.take(ctx, t.record.key())
	if err != nil {
		return err
	}
	defer give()
	if t, ok = s.images.toldOf(id); !ok { // it was removed, or the daemon is another one
		return nil
	}
	if refused && s.renewal.Refused != nil {
		s.renewal.Refused(t.record.Reference)
	}
	origin, err := s.source(ctx, t.record.Reference)
	switch {
	case err != nil:
		return err
	case origin.Login && sha256.Sum256(origin.Config) != t.config:
		if err := s.bind(ctx, t.layer, t.record, origin); err != nil {
			return err
		}
		s.log.Info("the daemon has another login for an image", "image", t.record.name())
	case origin.Login: // the same
		t.until = origin.Until
		s.images.setTold(t)
	}
	if refused && !origin.Login {
		return errNoLogin
	}
	return nil
}

var errNoLogin = errors.New("the registry refuses, and there is no login: say where logins come from (docker login, or credentials.providers in the snapshotter's configuration)")
