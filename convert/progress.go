package convert

import "sync"

// An Event says how far a conversion is.
type Event struct {
	Stage         Stage
	Name          string // of the layer, or of the blob that is pushed
	Layer, Layers int    // 1-based; of this stage
	Done, Total   int64  // bytes of this layer; Total 0: not known before
	End           bool   // this layer is finished
}

// A Stage is a part of a conversion.
type Stage string

// The stages, in this order. Only a conversion into a registry has the second.
const (
	StageRead Stage = "read"
	StagePush Stage = "push"
)

// A reporter calls f for one event after the other, and not any more once it is
// closed: an HTTP client may read a body for a moment after it gave up.
type reporter struct {
	mu sync.Mutex // guards f, what f does, and the events of all meters
	f  func(Event)
}

// A meter reports one layer.
type meter struct {
	r *reporter
	e Event
}

func (r *reporter) meter(e Event) *meter { return &meter{r, e} }

func (r *reporter) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.f = nil
}

func (m *meter) change(f func(e *Event)) {
	m.r.mu.Lock()
	defer m.r.mu.Unlock()
	f(&m.e)
	if m.r.f != nil {
		m.r.f(m.e)
	}
}

func (m *meter) add(n int64) { m.change(func(e *Event) { e.Done += n }) }

func (m *meter) restart() { m.change(func(e *Event) { e.Done = 0 }) }

func (m *meter) end() { m.change(func(e *Event) { e.Done, e.End = max(e.Done, e.Total), true }) }
