package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/snapshotter"
)

// A system answers nydus-snapshotter's system API, with its paths and bodies.
type system struct {
	c      config
	images imageKeeper
	daemon daemonKeeper
	tops   func(ctx context.Context, name string) (chainIDs []string, err error) // nil: nobody knows
}

// imageKeeper is the snapshotter.
type imageKeeper interface {
	Images(ctx context.Context) ([]snapshotter.Image, error)
	Prefetch(ctx context.Context, reference string, files []string) error
	Explain(ctx context.Context, reference string, chainIDs []string) ([]api.Explanation, error)
}

// daemonKeeper is erofsd.
type daemonKeeper interface {
	Version(ctx context.Context) (api.VersionInfo, error)
	Status(ctx context.Context) (api.Status, error)
	Upgrade(ctx context.Context, r api.UpgradeRequest) error
}

// handler serves
//
//	GET /api/v1/daemons               → []daemonInfo; empty while none answers
//	GET /api/v1/daemons/records       → 501, as in nydus-snapshotter
//	PUT /api/v1/daemons/upgrade       upgradeRequest
//	GET /api/v1/daemons/{id}/backend  → backendInfo, without secrets
//	PUT /api/v1/prefetch              []prefetchRequest
//
//	GET /api/erofsd/v1/explain?image= → []api.Explanation
//
// An error is {"code", "message"}, of the last one {"error"}.
func (s *system) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /api/v1/daemons", s.daemons)
	mux.HandleFunc("GET /api/v1/daemons/records", func(w http.ResponseWriter, _ *http.Request) {
		reply(w, nil, &api.Error{Status: http.StatusNotImplemented, Message: "there are no records beside /api/v1/daemons"})
	})
	mux.HandleFunc("PUT /api/v1/daemons/upgrade", s.upgrade)
	mux.HandleFunc("GET /api/v1/daemons/{id}/backend", s.backend)
	mux.HandleFunc("PUT /api/v1/prefetch", s.prefetch)
	mux.HandleFunc("GET "+api.Prefix+"/explain", s.explain)
	return mux
}

// explainTime is how long containerd may take to say what an image consists of.
const explainTime = 10 * time.Second

func (s *system) explain(w http.ResponseWriter, r *http.Request) {
	reference := r.URL.Query().Get("image")
	var chains []string
	var notAsked error
	if s.tops != nil && reference != "" {
		ctx, cancel := context.WithTimeout(r.Context(), explainTime)
		defer cancel()
		chains, notAsked = s.tops(ctx, reference)
	}
	list, err := s.images.Explain(r.Context(), reference, chains)
	if err == nil && len(list) == 0 && notAsked != nil {
		err = fmt.Errorf("no image is known by that reference, and containerd could not be asked: %w", notAsked)
	}
	if err != nil {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusInternalServerError)
		_ = json.NewEncoder(w).Encode(&api.Error{Message: err.Error()}) // nobody waits for it if this fails
		return
	}
	reply(w, list, nil)
}

// daemonID is erofsd's; there is one for all images.
const daemonID = "erofsd"

type daemonInfo struct {
	ID         string  `json:"id"`
	PID        int     `json:"pid"`
	Socket     string  `json:"api_socket"`
	Supervisor string  `json:"supervisor_path"`
	Reference  int     `json:"reference"`
	Mountpoint string  `json:"mountpoint"`
	StartupCPU float64 `json:"startup_cpu_utilization"`
	MemoryKiB  float64 `json:"memory_rss_kb"`
	ReadKiB    float64 `json:"read_data_kb"`

	Instances map[string]instanceInfo `json:"instances"` // by snapshot
}

type instanceInfo struct {
	Snapshot   string `json:"snapshot_id"`
	Dir        string `json:"snapshot_dir"`
	Mountpoint string `json:"mountpoint"`
	Image      string `json:"image_id"` // its reference
}

func (s *system) daemons(w http.ResponseWriter, r *http.Request) {
	list, err := s.list(r.Context())
	reply(w, list, err)
}

// list describes the daemon, if it answers.
func (s *system) list(ctx context.Context) ([]daemonInfo, error) {
	images, err := s.images.Images(ctx)
	if err != nil {
		return nil, err
	}
	ask, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	status, err := s.daemon.Status(ask)
	if err != nil {
		return []daemonInfo{}, ctx.Err()
	}
	d := daemonInfo{ID: daemonID, PID: status.PID, Socket: s.c.Daemon.Socket, MemoryKiB: residentKiB(status.PID), Instances: map[string]instanceInfo{}}
	for _, i := range images {
		if i.Mounted {
			d.Instances[i.Snapshot] = instanceInfo{i.Snapshot, i.Dir, i.Mountpoint, i.Reference}
		}
	}
	d.Reference = len(d.Instances)
	seen := map[string]bool{} // an image may be mounted twice
	for _, m := range status.Images {
		if key := m.DomainID + "/" + m.ID; !seen[key] {
			seen[key] = true
			d.ReadKiB += float64(m.BytesFetched) / 1024
		}
	}
	return []daemonInfo{d}, nil
}

// residentKiB is the memory of a process; 0 when it has ended.
func residentKiB(pid int) float64 {
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "statm"))
	fields := strings.Fields(string(text))
	if err != nil || len(fields) < 2 {
		return 0
	}
	pages, err := strconv.ParseFloat(fields[1], 64)
	if err != nil {
		return 0
	}
	return pages * float64(os.Getpagesize()) / 1024
}

type upgradeRequest struct {
	Path    string `json:"nydusd_path"`
	Version string `json:"version"` // not looked at, as in nydus-snapshotter
	Policy  string `json:"policy"`  // the same
}

func (s *system) upgrade(w http.ResponseWriter, r *http.Request) {
	var in upgradeRequest
	err := bodyOf(r, &in)
	if err == nil && in.Path != "" && !filepath.IsAbs(in.Path) {
		err = api.BadRequest(fmt.Errorf("nydusd_path: %q is no absolute path of erofsd", in.Path))
	}
	if err == nil {
		err = s.daemon.Upgrade(r.Context(), api.UpgradeRequest{Executable: in.Path})
	}
	reply(w, struct{}{}, err)
}

type prefetchRequest struct {
	Image string `json:"image"`    // its reference
	Files string `json:"prefetch"` // paths with commas between them
}

func (s *system) prefetch(w http.ResponseWriter, r *http.Request) {
	var in []prefetchRequest
	err := bodyOf(r, &in)
	var errs []error
	for _, p := range in {
		files := slices.DeleteFunc(strings.Split(p.Files, ","), func(f string) bool { return strings.TrimSpace(f) == "" })
		for i := range files {
			files[i] = strings.TrimSpace(files[i])
		}
		errs = append(errs, s.images.Prefetch(r.Context(), p.Image, files))
	}
	reply(w, struct{}{}, errors.Join(append(errs, err)...))
}

type backendInfo struct {
	Type   string `json:"type"`
	Config object `json:"config"`
}

// backend tells where the data of images come from. nydus-snapshotter tells secrets as
// well, for its daemon; ours has them by its API.
func (s *system) backend(w http.ResponseWriter, r *http.Request) {
	if r.PathValue("id") != daemonID {
		reply(w, nil, api.NotFound(fmt.Errorf("there is no daemon %.100q; the one is called %s", r.PathValue("id"), daemonID)))
		return
	}
	info := backendInfo{Type: "registry", Config: object{}}
	if s.c.Backend.Template != "" {
		text, err := readTemplate(s.c.Backend.Template)
		template := object{}
		if err == nil {
			err = json.Unmarshal(text, &template)
		}
		if err != nil {
			reply(w, nil, err)
			return
		}
		info.Type = backendType(template)
		info.Config = tellable(backendOf(template), info.Type)
	}
	if info.Type == "registry" && s.c.Backend.SkipVerify {
		info.Config["skip_verify"] = true
	}
	reply(w, info, nil)
}

// tellable is what a backend's table says that is surely no secret: a key that is not known
// here is not told.
func tellable(backend object, kind string) object {
	known := []string{
		"scheme", "host", "repo", "skip_verify", "timeout", "connect_timeout", "retry_limit", "blob_url_scheme", "blob_redirected_host", "dir", "blob_file",
		"endpoint", "bucket_name", "object_prefix", "region",
	}
	told := object{}
	for _, table := range []string{"config", kind} { // version 1, version 2
		said, _ := backend[table].(object)
		for _, key := range known {
			if v, ok := said[key]; ok {
				told[key] = v
			}
		}
	}
	return told
}

// bodyOf decodes a request. Keys that are not known are of a newer client, and let be.
func bodyOf(r *http.Request, v any) error {
	if err := json.NewDecoder(r.Body).Decode(v); err != nil {
		return api.BadRequest(fmt.Errorf("decode request: %w", err))
	}
	return nil
}

// reply answers with v, or with what went wrong.
func reply(w http.ResponseWriter, v any, err error) {
	w.Header().Set("Content-Type", "application/json")
	if err != nil {
		status := http.StatusInternalServerError
		if e := (*api.Error)(nil); errors.As(err, &e) {
			status = e.Status
		} else if errdefs.IsInvalidArgument(err) {
			status = http.StatusBadRequest
		} else if errdefs.IsUnavailable(err) {
			status = http.StatusServiceUnavailable
		}
		w.WriteHeader(status)
		v = struct {
			Code    string `json:"code"`
			Message string `json:"message"`
		}{"Unknown", err.Error()}
	}
	_ = json.NewEncoder(w).Encode(v) // nobody waits for it if this fails
}
