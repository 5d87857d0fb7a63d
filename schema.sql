-- liminal.db: who may come in, which threads exist, which providers were added. Small; may move to PostgreSQL one day.
pragma journal_mode = wal;
pragma synchronous = full;
pragma foreign_keys = on;

create table if not exists users (
  id text primary key,
  name text not null unique,
  role text not null check (role in ('owner', 'member')),
  created_at text not null
);

create table if not exists api_keys (
  id text primary key,
  user_id text not null references users on delete cascade,
  name text not null,
  prefix text not null,
  hash text not null unique,
  created_at text not null,
  last_used_at text
);

create table if not exists sessions (
  hash text primary key,
  key_id text not null references api_keys on delete cascade,
  created_at text not null,
  expires_at text not null
);

create table if not exists threads (
  id text primary key,
  user_id text not null references users on delete cascade,
  title text,
  system text,
  model text,
  forked_from_thread_id text,
  forked_from_message_id text,
  created_at text not null,
  updated_at text not null
);
create index if not exists threads_by_user on threads (user_id, updated_at desc, id);

create table if not exists providers (
  name text primary key,
  kind text not null,
  base_url text,
  key_env text,
  models text not null,
  prices text not null
);

-- messages.db: what was said. Large; may be sharded by thread or date one day, so nothing here refers to liminal.db.
pragma journal_mode = wal;
pragma synchronous = full;
pragma foreign_keys = on;

create table if not exists messages (
  seq integer primary key,
  id text not null unique,
  thread_id text not null,
  user_id text not null,
  number integer not null,
  parent_id text references messages (id),
  role text not null check (role in ('user', 'assistant')),
  speaker text,
  model text,
  status text not null check (status in ('pending', 'streaming', 'complete', 'cancelled', 'error')),
  position integer not null default 0,
  stop_reason text,
  usage text,
  timing text,
  error text,
  created_at text not null,
  completed_at text,
  unique (thread_id, number)
);
create index if not exists messages_by_parent on messages (parent_id);
create index if not exists messages_unfinished on messages (status) where status in ('pending', 'streaming');

-- One row a stored bundle. `position` is where it ends in its message, `parts` the JSON of what it holds.
create table if not exists chunks (
  message_id text not null references messages (id) on delete cascade,
  position integer not null,
  parts text not null,
  primary key (message_id, position)
) without rowid;

-- What search looks through: the text of finished messages, by messages.seq.
create virtual table if not exists message_texts using fts5 (content, tokenize = 'unicode61 remove_diacritics 2');

create table if not exists message_reactions (
  message_id text not null references messages (id) on delete cascade,
  user_id text not null,
  emoji text not null,
  created_at text not null,
  primary key (message_id, user_id, emoji)
) without rowid;

create table if not exists idempotency_keys (
  user_id text not null,
  key text not null,
  request_hash text not null,
  message_id text not null references messages (id) on delete cascade,
  created_at text not null,
  primary key (user_id, key)
) without rowid;

-- overflow.db: database bundles that the Edge could not bring to the Domain yet. Empty while all is well.
pragma journal_mode = wal;
pragma synchronous = full;

create table if not exists overflow (
  id integer primary key,
  message_id text not null,
  bundle text not null,
  bytes integer not null,
  created_at real not null,
  tries integer not null default 0
);
