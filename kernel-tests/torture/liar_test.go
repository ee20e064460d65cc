package torture

import (
	"context"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/erofsd/erofsd/backend/backendtest"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/daemon"
)

// A liar is a registry with the blobs of images that answers three of ten requests wrongly
// while it lies.
type liar struct {
	addr  string
	lying atomic.Bool
	lies  atomic.Int64 // that were told
	blobs map[string]string

	mu sync.Mutex // guards r
	r  *rand.Rand
}

// newLiar starts one, which tells the truth until it is told to lie.
func newLiar(t *testing.T, seed uint64, images ...*image) *liar {
	t.Helper()
	l := &liar{blobs: map[string]string{}, r: rand.New(rand.NewPCG(seed, 1))}
	for _, i := range images {
		names, err := filepath.Glob(filepath.Join(i.blobs, "*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			l.blobs["/v2/r/blobs/sha256:"+filepath.Base(name)] = name
		}
	}
	server := httptest.NewServer(l)
	t.Cleanup(func() {
		server.CloseClientConnections() // a request that is held back ends
		server.Close()
	})
	l.addr = strings.TrimPrefix(server.URL, "http://")
	return l
}

func (l *liar) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if lie := l.pick(); lie != nil {
		l.lies.Add(1)
		lie(w, r, http.HandlerFunc(l.truth))
		return
	}
	l.truth(w, r)
}

func (l *liar) truth(w http.ResponseWriter, r *http.Request) {
	name := l.blobs[path.Clean(r.URL.Path)]
	if name == "" {
		http.NotFound(w, r)
		return
	}
	http.ServeFile(w, r, name)
}

// pick returns what to do wrong, nil: nothing.
func (l *liar) pick() backendtest.Action {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.lying.Load() || l.r.IntN(10) >= 3 {
		return nil
	}
	all := lies()
	return all[l.r.IntN(len(all))]
}

// lies are all the ways to answer wrongly.
func lies() []backendtest.Action {
	list := []backendtest.Action{
		backendtest.TooMany(1),
		func(http.ResponseWriter, *http.Request, http.Handler) { panic(http.ErrAbortHandler) }, // no head
		backendtest.Reset(10), backendtest.Stall(-1), backendtest.Stall(10),
		backendtest.Drip(16<<10, 50*time.Millisecond), backendtest.Short(10), backendtest.Whole,
		backendtest.WrongRange("bytes 0-99/100"), backendtest.WrongBytes,
		func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
			http.Redirect(w, r, r.URL.Path, http.StatusTemporaryRedirect) // perhaps for ever
		},
	}
	for _, code := range []int{401, 403, 404, 416, 500, 502, 503, 504} {
		list = append(list, backendtest.Status(code))
	}
	return list
}

// domain is of the images that are bound.
const domain = "torture"

// bind makes the image one that is bound as name, with its blobs from the liar.
func (m *machine) bind(i *image, name string, l *liar) {
	m.t.Helper()
	type object = map[string]any
	config, err := json.Marshal(object{"device": object{
		"backend": object{"type": "registry", "config": object{
			"scheme": "http", "host": l.addr, "repo": "r", "timeout": 2, "connect_timeout": 2, "retry_limit": 3,
		}},
		"cache": object{"type": "fscache"},
	}, "mode": "direct"})
	if err != nil {
		m.t.Fatal(err)
	}
	i.bound = name
	m.retry("bind "+name, func() error {
		return m.BindImage(context.Background(), api.BindRequest{ID: name, DomainID: domain, Bootstrap: i.boot, Config: config})
	})
}

// forget unbinds the image, which is not mounted, and empties the cache.
func (m *machine) forget(i *image) {
	m.t.Helper()
	m.retry("unbind "+i.bound, func() error {
		err := m.UnbindImage(context.Background(), api.ImageRequest{Image: i.bound, DomainID: domain})
		if e := (*api.Error)(nil); errors.As(err, &e) && e.Status == http.StatusNotFound {
			return nil // a worker has died before it could say so
		}
		return err
	})
	m.evict()
}

// killEvery kills a worker whenever there was one for so long, until stop, which returns how
// many it were.
func (m *machine) killEvery(pause time.Duration) (stop func() int) {
	ctx, cancel := context.WithCancel(context.Background())
	killed := make(chan int, 1)
	go func() {
		n := 0
		for ctx.Err() == nil {
			_, err := m.Version(ctx) // waits until a worker serves
			select {
			case <-time.After(pause):
			case <-ctx.Done():
			}
			if err != nil {
				continue
			}
			v, err := m.Version(ctx) // an upgrade may have replaced it
			if err == nil && syscall.Kill(v.PID, syscall.SIGKILL) == nil {
				n++
			}
		}
		killed <- n
	}()
	return func() int {
		cancel()
		return <-killed
	}
}

// howLong is $MINUTES, or short.
func howLong(t *testing.T, short time.Duration) time.Duration {
	t.Helper()
	s := os.Getenv("MINUTES")
	if s == "" {
		return short
	}
	n, err := strconv.ParseFloat(s, 64)
	if err != nil || n <= 0 {
		t.Fatalf("MINUTES is %q: want a number", s)
	}
	return time.Duration(n * float64(time.Minute))
}

// TestLyingRegistry reads images of a registry that answers wrongly, below workers that are
// killed after a second. What cannot be had reads as EIO, nothing reads wrong, nobody waits
// for ever, and all can be read once the registry tells the truth.
func TestLyingRegistry(t *testing.T) {
	way := transport(t)
	seed := newSeed(t)
	one := newImage(t, seed, 200, "zstd")
	l := newLiar(t, seed, one)
	m := start(t, daemon.Options{Transport: way, FillTimeout: 10 * time.Second, NoCompletion: true})
	stop := m.killEvery(time.Second)
	r, s, n := rand.New(rand.NewPCG(seed, 0)), &score{mayFail: true}, 0
	for end := time.Now().Add(howLong(t, 8*time.Second)); time.Now().Before(end) && !t.Failed(); n++ {
		m.bind(one, "one", l)
		point := m.mount(one, "one")
		l.lying.Store(true)
		s.start(one, point, 64, r.Uint64())(t, m)
		l.lying.Store(false)
		m.recovers(one, point, r.Uint64())
		m.unmount(point)
		m.forget(one)
		if s.wrong.Load() > 0 {
			t.Errorf("%s; the first: %s", s, s.first)
		}
	}
	kills := stop()
	m.worker()
	m.stop()
	if kills == 0 || l.lies.Load() == 0 {
		t.Error("nothing was done to the readers")
	}
	t.Logf("rounds %d, lies %d, kills %d, %s", n, l.lies.Load(), kills, s)
}

// recovers waits until everything reads right, and nothing reads wrong.
func (m *machine) recovers(i *image, point string, seed uint64) {
	m.t.Helper()
	m.await("all of the image to be right", func() bool {
		s := &score{mayFail: true}
		s.start(i, point, 2, seed)(m.t, m)
		if s.wrong.Load() > 0 {
			m.t.Errorf("%s; the first: %s", s, s.first)
		}
		return !s.bad()
	})
}
