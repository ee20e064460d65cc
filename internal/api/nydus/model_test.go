package nydus_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/erofsd/erofsd/internal/api/nydus"
	"github.com/erofsd/erofsd/internal/api/nydus/nydustest"
)

// model is a Service of which only the states and registrations are real.
type model struct {
	setup nydustest.Setup
	data  map[string]string // bootstrap path to the id of its data blob
	exit  func()

	mu      sync.Mutex // guards what follows
	state   nydus.State
	level   string
	entries map[string]entry // by domain/id
	mounts  map[string]nydus.MountCommand
}

// entry is what the model reads of a blob entry.
type entry struct {
	Type   *string     `json:"type"`
	ID     *string     `json:"id"`
	Domain string      `json:"domain_id"`
	V1     *legacy     `json:"config"`
	V2     *configured `json:"config_v2"`
}

type legacy struct {
	ID      string `json:"id"`
	Backend string `json:"backend_type"`
	Config  struct {
		Auth string `json:"auth"`
	} `json:"backend_config"`
	Cache struct {
		Dir string `json:"work_dir"`
	} `json:"cache_config"`
	CacheType string `json:"cache_type"`
	Bootstrap string `json:"metadata_path"`
	Prefetch  *struct {
		Threads *int `json:"threads_count"`
		Size    int  `json:"merging_size"`
	} `json:"prefetch_config"`
}

type configured struct {
	ID      string `json:"id"`
	Backend struct {
		Type string `json:"type"`
	} `json:"backend"`
	Cache struct {
		Type    string `json:"type"`
		Fscache struct {
			Dir string `json:"work_dir"`
		} `json:"fscache"`
	} `json:"cache"`
	Bootstrap string `json:"metadata_path"`
}

func (m *model) Info() nydus.DaemonInfo {
	m.mu.Lock()
	defer m.mu.Unlock()
	info := nydus.DaemonInfo{
		Version: nydus.Version{Package: "0", GitCommit: "abc", BuildTime: "now", Profile: "release", Compiler: "go"},
		State:   m.state,
	}
	if m.setup.Supervisor {
		id, socket := "daemon-1", "/supervisor.sock"
		info.ID, info.Supervisor = &id, &socket
	}
	if m.setup.Mounts {
		info.Backends = map[string]nydus.Backend{}
	}
	for at := range m.mounts {
		info.Backends[at] = nydus.Backend{Type: "Rafs", Mountpoint: at}
	}
	return info
}

func (m *model) SetLogLevel(level string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.level = level
	return nil
}

func (*model) Events() nydus.Events { return nydus.Events{MaxErrors: 500, MaxSize: 51200} }

// move changes the state from one to another, or refuses the event.
func (m *model) move(from, to nydus.State, event string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.state != from {
		return nydus.UnexpectedEvent(event)
	}
	m.state = to
	return nil
}

func (m *model) Start(context.Context) error { return m.move(nydus.Ready, nydus.Running, "Start") }

func (m *model) Exit(context.Context) error {
	m.exit()
	return nil
}

func (m *model) SendFD(context.Context) error {
	if m.setup.Supervisor && m.setup.Empty {
		return nydus.NoFDs()
	}
	return nil
}

func (m *model) TakeOver(context.Context) error {
	switch {
	case m.Info().State != nydus.Init:
		return nydus.UnexpectedEvent("Takeover")
	case !m.setup.Supervisor:
		return nydus.MissingSupervisor()
	case m.setup.Empty:
		return nydus.UpgradeFailed(`"Restore"`, errors.New("the supervisor has no state"))
	}
	return m.move(nydus.Init, nydus.Ready, "Takeover")
}

func (m *model) Superblock(_ context.Context, at string) (nydus.Superblock, error) {
	return nydus.Superblock{}, m.mounted(at)
}

func (m *model) mounted(at string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.setup.Mounts {
		return nydus.Unsupported()
	}
	if _, ok := m.mounts[at]; !ok {
		return nydus.NoEntry(at)
	}
	return nil
}

func (m *model) Mount(_ context.Context, at string, c nydus.MountCommand) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.setup.Mounts {
		return nydus.Unsupported()
	}
	if _, ok := m.mounts[at]; ok {
		return nydus.MountFailed(errors.New("already mounted"))
	}
	m.mounts[at] = c
	return nil
}

func (m *model) Remount(_ context.Context, at string, _ nydus.MountCommand) error {
	return m.mounted(at)
}

func (m *model) Unmount(_ context.Context, at string) error {
	if err := m.mounted(at); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.mounts, at)
	return nil
}

func (m *model) PutBlob(_ context.Context, body []byte) error {
	var e entry
	if err := json.Unmarshal(body, &e); err != nil {
		return nydus.ParseBody("expected value", 1, 1)
	}
	switch {
	case e.Type == nil:
		return nydus.ParseBody("missing field `type`", 1, len(body))
	case e.ID == nil:
		return nydus.ParseBody("missing field `id`", 1, len(body))
	case e.V1 == nil && e.V2 == nil:
		return nydus.BadRequest(errors.New("no config"))
	case e.V1 == nil:
		e.V1 = &legacy{ID: e.V2.ID, Backend: e.V2.Backend.Type, CacheType: e.V2.Cache.Type, Bootstrap: e.V2.Bootstrap}
		e.V1.Cache.Dir = e.V2.Cache.Fscache.Dir
	}
	if err := e.check(); err != nil {
		return err
	}
	return m.register(e)
}

// check says what is wrong with e's values, in nydusd's order.
func (e entry) check() error {
	c := e.V1
	switch {
	case !slices.Contains([]string{"localfs", "registry", "http-proxy"}, c.Backend):
		return nydus.BadRequest(errors.New("backend_type"))
	case c.Prefetch != nil && (c.Prefetch.Threads != nil && *c.Prefetch.Threads == 0 || c.Prefetch.Size > 0x10000000):
		return nydus.BadRequest(errors.New("prefetch_config"))
	case *e.Type != nydus.BootstrapBlob || *e.ID == "" || strings.Contains(*e.ID+e.Domain, "/"):
		return nydus.Invalid(errors.New("type, id or domain_id"))
	case c.CacheType == "dummycache":
		return nydus.Invalid(errors.New("unknown cache type"))
	}
	if c.Config.Auth != "" {
		if _, err := base64.StdEncoding.DecodeString(c.Config.Auth); err != nil {
			return nydus.BadRequest(errors.New("auth is not base64"))
		}
	}
	if info, err := os.Stat(c.Bootstrap); err != nil || !info.Mode().IsRegular() {
		return nydus.Invalid(errors.New("metadata_path"))
	}
	if info, err := os.Stat(c.Cache.Dir); err != nil || !info.IsDir() {
		return nydus.IO(errors.New("work_dir"))
	}
	return nil
}

func (m *model) register(e entry) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.state == nydus.Init {
		return nydus.NotReady()
	}
	if m.data[e.V1.Bootstrap] == "" {
		return nydus.Invalid(errors.New("no bootstrap"))
	}
	key := e.Domain + "/" + *e.ID
	if old, ok := m.entries[key]; ok && old.V1.Bootstrap != e.V1.Bootstrap {
		return nydus.Exists(errors.New("of another image"))
	}
	m.entries[key] = e
	return nil
}

func (m *model) Blobs(_ context.Context, domain, id string) ([]nydus.BlobInfo, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.state == nydus.Init {
		return nil, nydus.NotReady()
	}
	var found []nydus.BlobInfo
	seen := map[string]bool{}
	for _, e := range m.entries {
		if e.Domain != domain {
			continue
		}
		if id == "" || id == *e.ID {
			found = append(found, nydus.BlobInfo{Type: nydus.BootstrapBlob, ID: *e.ID, DomainID: domain})
		}
		if blob := m.data[e.V1.Bootstrap]; !seen[blob] && (id == "" || id == blob) {
			seen[blob] = true
			found = append(found, nydus.BlobInfo{Type: nydus.DataBlob, ID: blob, DomainID: domain})
		}
	}
	slices.SortStableFunc(found, func(a, b nydus.BlobInfo) int { return strings.Compare(a.Type, b.Type) })
	return found, nil
}

func (m *model) DeleteBlob(_ context.Context, domain, id string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if id != "" {
		if _, ok := m.entries[domain+"/"+id]; !ok {
			return nydus.NoEntry(domain + "/" + id)
		}
		delete(m.entries, domain+"/"+id)
		return nil
	}
	for key, e := range m.entries {
		if domain != "" && e.Domain == domain {
			delete(m.entries, key)
		}
	}
	return nil
}

func (m *model) CullBlob(context.Context, string) error {
	if m.setup.NoFscache {
		return nydus.Unsupported()
	}
	if m.setup.Broken {
		return nydus.CullFailed(errors.New("no cache directory"))
	}
	return nil
}

// named returns the entries that go by the name id.
func (m *model) named(id string) (found []entry) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, e := range m.entries {
		names := []string{"", "/", e.V1.ID, "/" + e.V1.ID, *e.ID, e.Domain + "/" + *e.ID}
		if slices.Contains(names, id) {
			found = append(found, e)
		}
	}
	return found
}

// call is the index of reads among the calls that are counted, open that of opens.
const open, read = 2, 4

func (m *model) FsStats(id string) (nydus.FsStats, error) {
	if !m.setup.Mounts || id != "/counted" {
		return nydus.FsStats{}, nydus.NoCounter()
	}
	s := nydus.FsStats{FilesAccounted: true, LatencyMeasured: true, ID: id, Opens: 1, BytesRead: 4096}
	s.ReadsBySize[2], s.ReadsByLatency[0], s.Calls[open], s.Calls[read] = 1, 1, 1, 1
	return s, nil
}

func (m *model) FsFiles(id string, latest bool) (nydus.FsFiles, error) {
	switch {
	case !m.setup.Mounts:
		return nydus.FsFiles{}, nydus.NoCounter()
	case id == "/empty":
		return nydus.FsFiles{}, nil
	case latest:
		return nydus.FsFiles{Latest: [][]uint64{{2, 4}, {7}}}, nil
	}
	f := nydus.FileStats{TotalCalls: 1, BytesRead: 4096}
	f.ReadsBySize[2], f.Calls[read] = 1, 1
	return nydus.FsFiles{Counters: map[uint64]nydus.FileStats{2: f}}, nil
}

func (m *model) FsPattern(id string) ([]nydus.FilePattern, error) {
	switch {
	case !m.setup.Mounts:
		return nil, nydus.NoCounter()
	case id == "/empty":
		return nil, nil
	}
	return []nydus.FilePattern{{Inode: 2, Reads: 1, FirstSecond: 1700000000, FirstNanos: 5}}, nil
}

func (m *model) Inflight() ([]nydus.Inflight, error) {
	if !m.setup.Mounts {
		return nil, nydus.Unsupported()
	}
	return nil, nil
}

func (m *model) BackendMetrics(id string) (nydus.BackendMetrics, error) {
	found := m.named(id)
	if len(found) == 0 {
		return nydus.BackendMetrics{}, nydus.NoCounter()
	}
	return nydus.BackendMetrics{Type: found[0].V1.Backend}, nil
}

func (m *model) CacheMetrics(id string) (nydus.CacheMetrics, error) {
	found := m.named(id)
	if len(found) == 0 {
		return nydus.CacheMetrics{}, nydus.NoCounter()
	}
	metrics := nydus.CacheMetrics{Dir: "/cache"}
	for _, e := range found {
		metrics.Files = append(metrics.Files, m.data[e.V1.Bootstrap]+".blob.data")
	}
	return metrics, nil
}

func (m *model) Config(id string) (map[string]string, error) {
	values := map[string]string{}
	for _, e := range m.named(id) {
		key := "registry_auth"
		if id == "" {
			key = e.V1.ID + ":" + key
		}
		values[key] = e.V1.Config.Auth
	}
	return values, nil
}

func (m *model) SetConfig(_ context.Context, id string, values map[string]string) error {
	found := m.named(id)
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, e := range found {
		changed := *e.V1
		changed.Config.Auth = values["registry_auth"]
		e.V1 = &changed
		m.entries[e.Domain+"/"+*e.ID] = e
	}
	return nil
}

var _ nydus.Service = (*model)(nil)

// newModel returns a model in the state that a setup wants. Its exit does nothing.
func newModel(s nydustest.Setup) *model {
	return &model{
		setup: s, state: nydus.State(s.State), exit: func() {},
		entries: map[string]entry{}, mounts: map[string]nydus.MountCommand{},
		data: map[string]string{},
	}
}

// writeImages makes files that the model takes for bootstraps, and says the variables.
func (m *model) writeImages(dir string) (map[string]string, error) {
	vars := map[string]string{
		"BOOT1": dir + "/boot1", "BOOT2": dir + "/boot2", "MOUNT": dir, "BLOBDIR": dir,
		"BLOB1": strings.Repeat("1", 64), "BLOB2": strings.Repeat("2", 64),
	}
	for _, n := range []string{"1", "2"} {
		if err := os.WriteFile(vars["BOOT"+n], bytes.Repeat([]byte(n), 8), 0o600); err != nil {
			return nil, err
		}
		m.data[vars["BOOT"+n]] = vars["BLOB"+n]
	}
	return vars, nil
}
